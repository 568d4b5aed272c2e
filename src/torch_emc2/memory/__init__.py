"""What is remembered of every sample: where its entries lie, tables with an entry a sample, the chains'."""
