"""Text and questions: reading, splitting, cutting into samples."""
