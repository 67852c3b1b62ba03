"""torch.optim.Adamax with its state, its gradients and its work sharded over the ranks of a data-parallel job."""
