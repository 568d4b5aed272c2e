"""What is remembered of every sample: where its entries lie, tables with one entry per sample, and the chain table."""
