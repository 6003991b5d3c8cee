"""One probe for each CPU feature that this VMM virtualizes; ``test_every_feature.py`` runs them."""
