"""Model cards, the Hub and Spaces."""
