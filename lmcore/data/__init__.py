"""Text to verified token shards, and from shards to batches."""
