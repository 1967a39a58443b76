"""What the library costs, measured against its peers; results/ holds what the commands wrote."""
