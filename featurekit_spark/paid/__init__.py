"""What calls that cost money have in common, whatever they ask for: retries, rate limits, prices, token counts."""
