"""What happens to a run from outside, each case on real ranks: killed, told to stop, stopped dead, crowded."""
