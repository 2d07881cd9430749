"""Trainings and fits of what lies beyond `direct` and `reason`: gate, distillation, soft tokens."""
