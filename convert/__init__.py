"""Published checkpoints to parameter trees and back, without PyTorch."""
