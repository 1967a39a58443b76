"""What every room uses: nests of tensors, their sizes, calling a module, generators, checks of numbers."""
