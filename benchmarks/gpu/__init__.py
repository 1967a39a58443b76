"""The jobs that a GPU is wanted for, in order of worth, each a process with a time limit."""
