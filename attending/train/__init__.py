"""What every training stage shares: batches, losses, schedules, the step, its state, its scale."""
