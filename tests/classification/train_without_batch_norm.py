"""classification.train with models whose results do not depend on how images share batches."""

import sys

from torch import nn

from classification import train

build_model = train.build_model


def build_without(*arguments):
    model = build_model(*arguments)
    model.conv_head[1] = nn.Identity()
    return model


train.build_model = build_without
sys.exit(train.main())
