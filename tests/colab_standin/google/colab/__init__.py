"""A stand-in for Colab's package: by its presence alone a machine is Colab's; `google` is a namespace, as there."""
