"""The whole question at once: the same real model fine-tuned with each method, side by side."""
