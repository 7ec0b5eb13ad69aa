"""The paper's protocol: thresholds in place of a budget."""
