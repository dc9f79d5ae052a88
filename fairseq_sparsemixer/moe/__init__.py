"""The Mixture-of-Experts layer, in torch and fairscale alone: gates decide, dispatch moves tokens, experts compute."""
