"""The report: what each variant costs and gives, and which one to ship, as one HTML page and as Markdown.

evidence        what the stages left behind of each variant
tables          every table, as rows of plain values
recommendation  rules and preferences as data, and the reasons in words
plots, layer_plots, run_plots, svg      the pictures
page, markdown  the two documents
build           all of it into a folder
"""
