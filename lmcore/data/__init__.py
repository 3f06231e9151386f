"""Text to verified token shards, and from shards to batches."""

import os

# Arrow reads this once, when it is loaded, for the buffers inside its readers; its default allocator gives every page
# back between two batches (heap.py). What the user has set stays.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
