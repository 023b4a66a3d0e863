"""Pictures and pages of what the model did."""
