"""The CPU platform: real Megatron-Core on gloo, for tests and laptops. Installed only when no GPU is there."""
