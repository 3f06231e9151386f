"""What a trained model is good for: evaluation, generation, export."""
