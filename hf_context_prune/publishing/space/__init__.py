"""A Gradio Space: base and pruned model side by side, from one YAML file."""
