"""What a balancer learns: history, learned weights, diagnosis, plots, loggers."""
