"""Pure tensor functions of the methods: no state, no logging, no trainer."""
