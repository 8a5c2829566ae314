"""The paper's networks, as functional Keras models that return float32 logits.

For small images, such as 32 x 32: `vgg16`, `resnet18`, `wide_resnet`, `pyramidnet` and
`vit`. For images of 224 x 224: `imagenet_vgg16`, `imagenet_resnet50` and
`imagenet_resnet101`, which come from `keras.applications`. All are initialized as in
the original papers. `with_l2` adds weight penalties, of which they have none.
"""

from keras_nrs.models.imagenet import imagenet_resnet50 as imagenet_resnet50
from keras_nrs.models.imagenet import imagenet_resnet101 as imagenet_resnet101
from keras_nrs.models.imagenet import imagenet_vgg16 as imagenet_vgg16
from keras_nrs.models.layers import with_l2 as with_l2
from keras_nrs.models.pyramidnet import pyramidnet as pyramidnet
from keras_nrs.models.resnet import resnet18 as resnet18
from keras_nrs.models.vgg import vgg16 as vgg16
from keras_nrs.models.vit import vit as vit
from keras_nrs.models.wide_resnet import wide_resnet as wide_resnet
