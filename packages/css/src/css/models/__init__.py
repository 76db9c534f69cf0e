"""Networks: our DeepLabV3, a tiny one, and adapters of other libraries, under growing heads."""
