"""The commands of `keras-nrs`.

A command imports Keras, and the packages that only it needs, when it runs: arguments
are checked first, as far as that needs no Keras.
"""

# In the order in which `--help` lists the commands.
from keras_nrs.commands import models as models
from keras_nrs.commands import recipes as recipes
from keras_nrs.commands.app import app as app
