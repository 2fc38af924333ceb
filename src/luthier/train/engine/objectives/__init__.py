"""What is learned: one function of a batch's loss per training method."""
