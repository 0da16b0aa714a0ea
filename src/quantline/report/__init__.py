"""The report: quality, size and speed of each variant, and which one to ship, as one HTML page and as Markdown.

evidence        results and output files of each variant
tables          every table, as rows of plain values
recommendation  rules and preferences as data, and the reasons as sentences
plots, layer_plots, run_plots, svg      the plots
page, markdown  the two documents
build           writes the report's folder
"""
