"""From a configuration and hosts to a `JobPlan`: pure functions, one a task type."""
