"""Chat examples to tokens, masks, padded batches and losses."""
