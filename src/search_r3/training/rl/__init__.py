"""What stage 2 learns from: rollouts and their rewards, what they say, and the loss of their vectors."""
