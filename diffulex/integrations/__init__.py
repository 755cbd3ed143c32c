"""Where other libraries lead to the ops."""
