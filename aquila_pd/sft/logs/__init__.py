"""What a training run says about itself: records, a JSON Lines file, the terminal, VisualDL, a curve."""
