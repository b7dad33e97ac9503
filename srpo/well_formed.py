"""Texts that can be encoded; others write what JSON lets pass and nothing else takes."""


def well_formed(text: str) -> str:
    """The text with every lone surrogate replaced: no tokenizer and no file takes one. A pair becomes its letter."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
