"""What policies are made of: importance scores and selection rules, as pure functions of tensors."""
