"""Names that the product's files promise to others, for the tests that hold it to them."""

ITEM_FIELDS = {
    "item",
    "contender",
    "prompt_tokens",
    "output",
    "finish_reason",
    "scores",
    "output_tokens",
    "seconds",
}
