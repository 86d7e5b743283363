class Setting:
    def __init__(self, *a):
        pass


class Threshold:
    pass
