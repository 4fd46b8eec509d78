"""The CPU platform runs real Megatron-Core on gloo, for tests and laptops; it is installed only without a GPU."""
