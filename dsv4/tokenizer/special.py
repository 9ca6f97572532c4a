"""Spellings of the special tokens of V4's prompts, in the order of the nano tokenizer's ids."""

from deepseek_recipe import SpecialToken

BOS = SpecialToken.Bos.default_str()
EOS = SpecialToken.Eos.default_str()
PAD = "<｜▁pad▁｜>"
USER = SpecialToken.User.default_str()
ASSISTANT = SpecialToken.Assistant.default_str()
THINK = SpecialToken.ThinkingStart.default_str()
END_THINK = SpecialToken.ThinkingEnd.default_str()
DSML = SpecialToken.Dsml.default_str()
LATEST_REMINDER = SpecialToken.LatestReminder.default_str()
FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
QUICK_INSTRUCTIONS = (
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
# BOS, EOS and pad keep their official ids 0, 1, 2; the official vocabulary has the others at 128800 and above.
SPECIAL_TOKENS = (BOS, EOS, PAD, *FIM, USER, ASSISTANT, THINK, END_THINK, DSML, LATEST_REMINDER, *QUICK_INSTRUCTIONS)


def placeholder(n: int) -> str:
    """Spelling of the n-th unused id, as in the official vocabulary."""
    return f"<｜place▁holder▁no▁{n}｜>"
