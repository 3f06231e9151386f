"""The model: mixers, feed-forwards, depth, heads, loss, and the planner that knows their cost exactly."""
