"""From a trained model to results: evaluation, text, and models in the formats of others."""
