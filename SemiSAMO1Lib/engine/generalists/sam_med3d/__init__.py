"""SAM-Med3D: an own implementation, exact to the published weights."""
