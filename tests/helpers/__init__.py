"""What the tests share: commands, small datastores and models, oracles."""
