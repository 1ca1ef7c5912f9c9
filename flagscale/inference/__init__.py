"""What runs inside an inference job: here a backend may be imported at module level."""
