from .dit import DiT
def build_net(c):
    return DiT(depth=c.depth,hidden_size=c.hidden_size,num_heads=c.num_heads,patch_size=c.patch_size,input_size=c.input_size,in_channels=c.in_channels,num_classes=c.num_classes,mlp_ratio=c.mlp_ratio,time_embedding=tuple(c.time_embedding.split(',')))
