"""nelbo trains, samples and measures diffusion models: every nat is accounted for."""

__version__ = "0.1.0"
