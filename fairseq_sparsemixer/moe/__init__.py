"""The Mixture-of-Experts layer, on torch and fairscale only: gates decide, dispatch moves tokens, experts compute."""
