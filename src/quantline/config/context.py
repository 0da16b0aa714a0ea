"""How many tokens the server takes, and who needs how many.

The only place that knows what `serve.max_model_len=auto` stands for. It follows from the other options alone, so it can be
frozen before a model is there: what evaluation and speed need, what tasks use, and at least what is usual. A model that
takes less is served with what it takes, as long as nothing is cut that must not be. `evaluate.window=auto` follows the
model, too, see `ProtocolConfig.fitted`.
"""

from __future__ import annotations

from typing import Protocol

from quantline.config.data import CalibrationConfig
from quantline.config.evaluate import EvaluateConfig, ProtocolConfig
from quantline.config.serve import ServeConfig
from quantline.config.speed import SpeedConfig
from quantline.config.tasks import TasksConfig

# Enough for the questions of the smoke test and for prompts of tasks without examples.
USUAL = 1024
# Prompts of the standard tasks with their usual examples: 5 of mmlu or gsm8k, 25 of arc_challenge. Longer ones are cut.
WITH_EXAMPLES = 4096
_TOKENS_A_WORD = 4


class Lengths(Protocol):
    """The sections of a configuration that have lengths in tokens."""

    serve: ServeConfig
    evaluate: EvaluateConfig
    tasks: TasksConfig
    speed: SpeedConfig
    calibration: CalibrationConfig


def longest_window(protocol: ProtocolConfig, positions: int | None = None) -> int:
    """The tokens of the longest window that a protocol can give.

    positions: the most tokens that the model takes, for a window that follows it; None if that is unknown.
    """
    window, _ = protocol.fitted(positions).lengths
    if protocol.mode == "concatenated":
        return window
    limits = [limit for limit in (protocol.max_document_tokens, protocol.max_tokens) if limit is not None]
    return min(window, *(limit + (protocol.bos == "add") for limit in limits)) if limits else window


def window_note(protocol: ProtocolConfig, positions: int | None) -> str | None:
    """What to say of a window that is shorter because the model takes less; None if it is not."""
    window, _ = protocol.fitted(positions).lengths
    if window == protocol.fitted().lengths[0]:
        return None
    return (
        f"evaluate.window=auto: {window} tokens, since the model takes {positions} and the server one more than a window; "
        "the result compares with none of a longer window"
    )


def needs(config: Lengths, positions: int | None = None) -> dict[str, int]:
    """The tokens that the server must take, by the options that need them. The server adds a token to a window.

    positions: the most tokens that the model takes, for a window that follows it; None if that is unknown.
    """
    speed, evaluate = config.speed, config.evaluate.fitted(positions)
    needed = {f"evaluate.window={evaluate.window}": longest_window(evaluate) + 1}
    if speed.tools and speed.runtime == "vllm":
        prompt, answer = speed.input_tokens, speed.output_tokens
        needed[f"speed.input_tokens={prompt} speed.output_tokens={answer}"] = prompt + answer
    return needed


def automatic(config: Lengths) -> int:
    """What `serve.max_model_len=auto` stands for."""
    continued = config.evaluate.generations
    wished = [USUAL, USUAL // 2 + config.serve.smoke.max_tokens, continued.prompt_tokens + continued.new_tokens]
    tasks = config.tasks
    if tasks.any:
        words = [task.context_words for task in (tasks.local.last_word, tasks.local.multiple_choice) if task]
        wished += [_TOKENS_A_WORD * count for count in words]
        if any(task.num_fewshot != 0 for task in tasks.standard.values()):
            wished.append(WITH_EXAMPLES)
    return max(*wished, *needs(config).values())


def served_length(config: Lengths, positions: int | None) -> int:
    """The context length that the server is started with.

    positions: the most tokens that the model takes; None if that is unknown.
    """
    given = config.serve.length
    return min(given, positions) if positions and given == automatic(config) else given


def length_faults(config: Lengths) -> list[str]:
    """Options that need more tokens than a given `serve.max_model_len` has."""
    given = config.serve.length
    return [
        f"{options}: the server needs serve.max_model_len={needed} for it, and {given} is given; "
        "leave serve.max_model_len=auto, or give less here"
        for options, needed in needs(config).items()
        if needed > given
    ]


def model_faults(config: Lengths, positions: int | None, *, calibrated: bool) -> list[str]:
    """Options that need more tokens than the model takes.

    positions: the most tokens that the model takes; None if that is unknown. calibrated: whether there are samples of a
    calibration, which every method has.
    """
    if not positions:
        return []
    takes = f"the model takes at most {positions} tokens"
    asked = {options: (needed, "") for options, needed in needs(config, positions).items()}
    length, _ = config.evaluate.fitted(positions).lengths
    window = f"evaluate.window={length}"
    remedy = f"give {positions - 1} or less; the result then compares with no published one of a longer window"
    asked[window] = (max(asked[window][0], length), remedy)
    if calibrated:
        asked[f"calibration.seq_len={config.calibration.seq_len}"] = (config.calibration.seq_len, "")
    if config.serve.length != automatic(config):
        asked[f"serve.max_model_len={config.serve.length}"] = (config.serve.length, "leave it auto")
    return [
        f"{options}: {takes}{', and the server one more than a window' if options == window else ''}; "
        f"{remedy or 'give less'}"
        for options, (needed, remedy) in asked.items()
        if needed > positions
    ]


def fitting(config: Lengths, positions: int | None, *, calibrated: bool) -> list[str]:
    """The options that mend every fault of `model_faults`, each as it is typed."""
    if not positions:
        return []
    given: dict[str, int] = {}
    window, stride = config.evaluate.fitted(positions).lengths
    if max(window, longest_window(config.evaluate, positions) + 1) > positions:
        given["evaluate.window"] = positions - 1
        if positions <= stride < window:  # given by itself; otherwise it follows the window
            given["evaluate.stride"] = positions - 1
    prompt, answer = config.speed.input_tokens, config.speed.output_tokens
    if config.speed.tools and config.speed.runtime == "vllm" and prompt + answer > positions:
        if answer >= positions:
            given["speed.output_tokens"] = answer = positions // 2
        given["speed.input_tokens"] = min(prompt, positions - answer)
    if calibrated and config.calibration.seq_len > positions:
        given["calibration.seq_len"] = positions
    words = [f"{option}={value}" for option, value in given.items()]
    automatically = config.serve.length == automatic(config) or config.serve.length <= positions
    return words if automatically else [*words, "serve.max_model_len=auto"]
