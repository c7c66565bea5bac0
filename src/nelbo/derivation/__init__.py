"""The identities behind the bound and the game, each as something that runs."""
