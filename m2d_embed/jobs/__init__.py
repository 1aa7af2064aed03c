"""Long work over many files: what is done is kept piece by piece, and a killed job goes on where it was."""
